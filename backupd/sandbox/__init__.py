"""Container engines: reaching containers that are there, and making fresh ones for a restore.

`docker` is the first; another engine is another module here that implements `model.Container` and
`model.Sandbox`. Nothing above this room knows which engine it is.
"""
