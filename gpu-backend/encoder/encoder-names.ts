/** The full encoder's names, apart from what opens it, so that the command line can say them without loading a runtime. */

/** The teacher of the static table that ships, and what `/v1/embeddings` runs. */
export const FULL_ENCODER = 'all-minilm-l6-v2';
export const FULL_ENCODER_REPOSITORY = 'sentence-transformers/all-MiniLM-L6-v2';
