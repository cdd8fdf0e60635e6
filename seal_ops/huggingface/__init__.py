"""The seam into Hugging Face transformers: registries, rotation, discovery, the reversible patch, loading."""
