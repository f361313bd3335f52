"""Text to Megatron `.bin/.idx`: corpora, tokenizers, preparation and inspection.

`prepare.prepare` writes a folder, `prepared.PreparedData.open` opens and checks it.
"""
