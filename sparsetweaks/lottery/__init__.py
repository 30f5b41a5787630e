"""A thin reference lottery: draw tickets, spend them with and without the tweaks, show what came of it.

The rooms, each of which uses only those above it:

    config.py      what determines a run: network, recipe, tweaks
    ranks.py       one training in several processes
    files.py       files that are there whole or not at all; one process per folder
    layouts.py     folders of images
    data.py        data sets as tensors in memory
    models.py      the paper's networks for small images, torchvision's, and a user's
    store.py       tickets
    train.py       the one training loop
    tweaking.py    a ticket with its tweaks
    spend.py       retraining it, one row of results per run
    draw.py        tickets by iterative and one-shot magnitude pruning, without training, or of any mask
    pools.py       Lottery Pools, the bar without tweaks
    grid.py        independent runs, side by side
    on_ray.py      the same on Ray
    results.py     rows as a table, as statistics and as a picture
    experiment.py  a comparison of variants over levels and seeds
    demo.py        one on digits, in about two minutes
    smoothness.py  looks at the networks of spent tickets: curvature, landscapes, activations
    figures.py     the paper's figures and table, as data
    contrasts.py   numbers across seeds: contrasts and ratios, as rows and as a table
    claims.py      what the paper says against what came out, with a verdict
    pictures.py    pictures of looks
    reproduce.py   a figure, from its trainings to its comparison with the paper
    report.py      a folder of results as one page
    events.py      TensorBoard's files
    progress.py    how far a command is
    options.py     the options that commands share
    commands.py    the commands
    cli.py         what starts them, and turns a user's mistakes into one line
"""
