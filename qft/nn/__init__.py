"""What holds packed weights in a model: QuantLinear, QuantEmbedding, QuantExperts."""
