"""Realigning connectors with little or nothing kept of old rows; see docs/beyond.md [ours]."""
