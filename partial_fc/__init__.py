"""The sharded margin-softmax classifier. Imports nothing of the project outside itself."""
