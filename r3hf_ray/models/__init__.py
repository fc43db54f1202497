"""Models in one process: loading, logprobs, values, prefix scores, sharding and checkpoints (layer 2, no Ray).

Importing it tells transformers' auto classes of our one model type, so that its folders need no foreign code here.
"""

from transformers import AutoConfig, AutoModelForSequenceClassification

from r3hf_ray.models.running_sum import RunningSumConfig, RunningSumForSequenceClassification

AutoConfig.register(RunningSumConfig.model_type, RunningSumConfig)
AutoModelForSequenceClassification.register(RunningSumConfig, RunningSumForSequenceClassification)
# Saved folders name these classes in auto_map and hold a copy of their file.
RunningSumConfig.register_for_auto_class()
RunningSumForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
