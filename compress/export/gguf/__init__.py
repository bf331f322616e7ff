"""The profile gguf: a file of architecture deci, as an unmodified llama.cpp reads it."""
