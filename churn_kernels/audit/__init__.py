"""Where, when and why two runs part ways.

What is here so far is the hash that tells whether two tensors have the same bits.
"""

from churn_kernels.hashing import HASH_SPEC, hash_of_words, hash_words, tensor_hash

__all__ = ["HASH_SPEC", "hash_of_words", "hash_words", "tensor_hash"]
