"""The built-in strategies and their parts: plugins, written exactly as third-party plugins are."""
