"""Text to Megatron `.bin/.idx`: corpora, tokenizers, preparation and inspection.

`prepare.prepare` makes a folder, `prepared.PreparedData.open` reads it back and checks it.
Importing the room loads neither torch nor tokenizers.
"""
