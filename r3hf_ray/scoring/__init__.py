"""Reading a reward model: every prefix of a response in one forward, in the policy's tokens or its own."""
