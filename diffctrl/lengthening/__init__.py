"""From clips to a length LoRA: what is trained on, the plan with its checks, the training that resumes."""
