"""Models with a memory, grafted onto Hugging Face decoders."""
