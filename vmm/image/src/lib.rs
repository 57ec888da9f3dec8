//! An OCI image to one read-only EROFS disk
