"""All that writes data: sources of documents, their tokenization into stores, and the plans that pack them."""
