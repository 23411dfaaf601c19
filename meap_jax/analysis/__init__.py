"""What attention weights say of models: attention at masked keys, and its shares by segment."""
