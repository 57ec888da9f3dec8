//! The Machines-API compatible REST API and the image registry
