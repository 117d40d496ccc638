"""What an experiment needs on accelerators that are not here: ``python -m adacm2_jax.plan``.

``steps`` has the three programs as shapes, ``topology`` the devices, ``report`` compiles and says
what came of it, ``hlo`` reads the compiled program, ``need`` says what arithmetic the model needs,
``estimate`` adds up memory without a compiler, from the arrays that ``phases`` lists, ``search``
finds the largest batch.
"""
