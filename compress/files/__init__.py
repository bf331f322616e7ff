"""Pipeline files: read, check and build what a YAML file describes."""
