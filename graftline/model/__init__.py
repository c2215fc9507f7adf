"""The multimodal model and its parts: backbone, frozen encoders, connectors."""
