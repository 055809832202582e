"""Trireme's federated rounds as a Flower app, in an environment that has Flower and not Trireme.

server_app  the rounds, by Flower's FedAvg, from an offer to weights that `trireme online federate take` judges
client_app  a round of a client: `trireme online federate lesson`, in Trireme's environment
pyproject.toml  the app, as Flower reads it: components and settings of a run
"""
