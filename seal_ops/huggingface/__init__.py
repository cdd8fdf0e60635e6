"""The integration with Hugging Face transformers: registries, rotation, discovery, the reversible patch, loading."""
