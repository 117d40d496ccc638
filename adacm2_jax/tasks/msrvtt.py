"""MSR-VTT (Xu et al., CVPR 2016), questions by Xu et al. (ACM MM 2017).

One-word answers, and captions. As MA-LMM scores answers: the first word of the best beam must be
the answer.
"""

from adacm2_jax.tasks.ma_lmm import words_and_captions

TASKS = words_and_captions("msrvtt")
