"""Every field of an experiment, with its default; the experiments beside this file change a few.

A field is overridden on the command line as ``--config.train.steps=100``; one that does not exist
is an error.
"""

import ml_collections

from adacm2_jax.config import AdaCM2Config, to_dict


def base_config(model: AdaCM2Config) -> ml_collections.ConfigDict:
    """The defaults around a model."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            # Where parameters (and tokenizers) come from unless this run has saved its own: a
            # directory of train.py, or a converted checkpoint (python -m adacm2_jax.port).
            "init_from": "",
            # Expressions over the paths of parameters that init_from may lack; they start fresh.
            "init_missing": (),
            # A directory with both tokenizers; empty learns them from the training texts.
            "tokenizers": "",
            # Devices: (data, model); -1 takes all that are left.
            "mesh": (-1, 1),
            # See adacm2_jax/config.py; each field can be overridden, e.g. model.memory.policy.
            "model": to_dict(model),
            "data": {
                "source": "jsonl",  # or needle
                # JSON-lines files with video, question, answer and optional start, end.
                "jsonl": {"train": "", "test": ""},
                "needle": {
                    "num_frames": 4,
                    "train_size": 8000,
                    "test_size": 1000,
                    "evidence_only": False,  # only the frame that answers
                },
                "data_dir": "runs/data",  # where prepared data sets are written
                "prompt": "{question}",  # what both language networks are asked
                # uniform: num_frames spread over the video. fps: that many a second, whatever the
                # length; max_frames > 0 spreads that many over a video that would have more.
                "sampling": {"mode": "uniform", "num_frames": 8, "fps": 1.0, "max_frames": 0},
                "jitter": False,  # training: a random instant in each segment
                "resize": "clean",  # or ma_lmm: as MA-LMM evaluates, see adacm2_jax/video/resize.py
                "on_truncated": "error",  # or use: go on with what could be read
                "cache": False,  # keep decoded training clips on disk (short videos, many epochs)
                "cache_dir": "runs/cache",
                # A directory of prepare.py: its features are read instead of the training clips.
                "features": "",
                "workers": 0,  # decoding processes in training; 0 decodes in threads
            },
            "train": {
                "steps": 1000,
                "batch_size": 8,
                "num_frames": 8,
                "log_every": 20,
                # two_phase: the exact gradient, with activations of one frame; the ViT is frozen.
                # scan: through all frames, for an experiment that trains the ViT.
                "gradient": "two_phase",
                "chunk": 16,  # two_phase: frames that pass through the networks together
                "accumulate": 1,  # parts of a batch that are computed one after the other
            },
            "optim": {
                "learning_rate": 1e-4,
                "warmup_steps": 100,
                "weight_decay": 0.05,
                "b1": 0.9,
                "b2": 0.999,
                "clip_norm": 1.0,
                # (expression over parameter paths, factor on the learning rate or None = frozen);
                # the first match counts.
                "groups": (("(vision|llm)/.*", None), (".*", 1.0)),
            },
            # The newest `keep` stay on disk, and every `keep_every`-th step (0: none) for ever.
            "checkpoint": {"every": 500, "keep": 2, "keep_every": 0},
            "eval": {
                "every": 0,  # steps between evaluations in training; 0: only at the end
                "limit": 0,  # questions of the split; 0: all
                "batch_size": 8,
                "chunk": 16,  # frames that pass through the networks together
                "workers": 2,  # decoding threads
                "policies": ("adacm2",),  # all read the same frames
                "full_frames": 0,  # longest video for policy full; 0: data.sampling's number
                "split": "test",
            },
            # See adacm2_jax/inference/generate.py.
            "generation": {
                "max_new_tokens": 8,
                "min_new_tokens": 1,
                "num_beams": 1,
                "length_penalty": 1.0,
                "repetition_penalty": 1.0,
                "num_return": 1,
                "temperature": 0.0,
                "top_p": 1.0,
            },
        }
    )
