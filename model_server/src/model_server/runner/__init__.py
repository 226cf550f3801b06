"""What runs inside a model's environment: the standard library and what the model brings.

The server hands `__main__.py` to the environment's interpreter by path, so nothing of the server
has to be installed beside a model.
"""
