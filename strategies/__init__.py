"""The built-in strategies and their parts: plugins, written exactly as a stranger would write them."""
