"""Graftline grows a multimodal LLM one modality at a time without hurting what it knows."""
