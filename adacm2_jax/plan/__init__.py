"""What an experiment needs on accelerators that are not here: ``python -m adacm2_jax.plan``.

``steps`` has the three programs as shapes, ``topology`` the devices, ``report`` compiles and says
what came of it, ``flops`` counts the arithmetic of a traced program, ``search`` finds the largest
batch, ``of_run`` takes the experiment of a run.
"""
