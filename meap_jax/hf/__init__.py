"""Models of the Hugging Face hub: their config.json, safetensors and tokenizer files, read and written."""
