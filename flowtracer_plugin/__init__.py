"""Trace which tokens carried a language model's answer, and train on them."""
