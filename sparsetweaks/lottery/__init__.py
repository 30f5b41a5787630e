"""A thin reference lottery: draw tickets, spend them with and without the tweaks, show what came of it.

The rooms, each of which uses only those above it:

    config.py    what determines a run: network, recipe, tweaks
    data.py      data sets as tensors in memory
    models.py    the CIFAR-style ResNet of He et al.
    store.py     tickets and trainings as files
    train.py     the one training loop
    spend.py     retraining a ticket with tweaks, one row of results per run
    draw.py      iterative and one-shot magnitude pruning with rewinding
    grid.py      independent runs, side by side
    results.py   rows as a table and as a picture
    demo.py      all of it on digits, in about two minutes
    commands.py  the commands
    cli.py       what starts them, and turns a user's mistakes into one line
"""
