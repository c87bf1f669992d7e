"""The only importer of transformers: how a Hugging Face model meets the cache."""
