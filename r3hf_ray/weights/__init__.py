"""Weights from learner to samplers: the contract and the proof, and a file for each way they travel."""
