//! The shared nouns of Tern, the store they are kept in and the view they are read from
