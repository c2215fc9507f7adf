"""Finished models as folders: one more modality for one, several made one, others' taken apart."""
