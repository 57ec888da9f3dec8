//! What a host and the init of its guest say to each other
