"""For lmms-eval: a model (``model.py``) and the tasks that it lacks (``tasks/``); docs/tasks.md."""
