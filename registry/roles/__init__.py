"""The roles a plugin can play, one abstract class each, and the hooks that find them."""
