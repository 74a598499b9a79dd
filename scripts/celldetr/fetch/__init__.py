"""Getting raw files: downloads, members of remote archives, Hugging Face, CELLxGENE."""
