"""What an experiment needs on accelerators that are not here: ``python -m adacm2_jax.plan``.

``steps`` has the three programs as shapes, ``topology`` the devices, ``report`` compiles and says
what came of it, ``hlo`` reads the compiled program, ``need`` says what arithmetic the model needs,
``estimate`` says the same of memory without a compiler, ``search`` finds the largest batch.
"""
