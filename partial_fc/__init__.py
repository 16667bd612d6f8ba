"""The sharded margin-softmax classifier. Imports no other package of this project."""
