"""`jlora.lora`: entries of an adapter meet the program.

What is done with one primitive is in `_rules`. Begin at `lora.py`.
"""
