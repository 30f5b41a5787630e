"""A thin reference lottery: draw tickets, spend them with and without the tweaks, show what came of it.

The rooms, each of which uses only those above it:

    config.py    what determines a run: network, recipe, tweaks
    data.py      data sets as tensors in memory
    models.py    the CIFAR-style ResNet of He et al.
    train.py     the one training loop
    store.py     tickets and finished stages as files
    draw.py      iterative and one-shot magnitude pruning with rewinding
    spend.py     retraining a ticket with tweaks, one row of results per run
    results.py   rows as a table and as a picture
    demo.py      all of it on digits, in two minutes
    cli.py       the command line
"""
