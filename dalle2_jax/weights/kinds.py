"""Names that the commands and functions of this package accept. Imports nothing."""

CLIP_KINDS = ("openai_clip", "open_clip", "hf_clip")
"""Kinds of CLIP checkpoints."""

KINDS = ("karlo", "kandinsky", "eclipse", "laion", "glide", "adm", *CLIP_KINDS)
"""Kinds of checkpoints that can be imported as stages of a system."""

FEATURE_KINDS = ("inception", "vgg16", "lpips", "efficientnet_lite0", "dinov2")
"""Kinds of image networks that can be imported for measures that compare features."""

FORMS = ("diffusers", "hf_clip", "openai_clip", "open_clip")
"""Forms of an export."""

IMPORT_DTYPES = ("float32", "bfloat16")
"""Dtypes in which imported weights are stored."""

PACK_DTYPES = ("bfloat16", "float32")
"""Dtypes of the weights of a packed system."""

EXPORT_DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes of exported tensors."""

TABLE_DTYPES = ("float64", "float32")
"""Dtypes of the tables of an imported noise schedule."""

ATTENTION_ORDERS = ("legacy", "new")
"""Orders of the rows of ADM's attention projections."""

ATTENTIONS = ("relaxed", "cosine")
"""Attentions of DALLE2-pytorch priors that leave no trace in the file."""
