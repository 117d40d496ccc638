"""PyTorch checkpoints in and out: Hugging Face InstructBLIP, LAVIS and MA-LMM.

``rules.py`` says how one tensor becomes another, ``names.py`` which one becomes which,
``source.py`` reads their files, ``store.py`` writes and reads ours, ``importer.py`` and
``exporter.py`` join them, and ``verify.py`` compares the two sides. Command line:
``python -m adacm2_jax.port``.
"""
