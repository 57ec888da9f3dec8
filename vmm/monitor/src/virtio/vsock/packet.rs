//! The header of a vsock packet (virtio 1.2, section 5.10.6).

/// `struct virtio_vsock_hdr`, as the guest wrote it: nothing in it is checked yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Sender's context id.
    pub src_cid: u64,
    /// Receiver's context id.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes of payload behind the header.
    pub len: u32,
    /// Kind of socket; see [`TYPE_STREAM`].
    pub kind: u16,
    /// What the packet is for; see [`Op`].
    pub op: u16,
    /// With [`Op::Shutdown`]: what ends.
    pub flags: u32,
    /// How many bytes the sender can hold.
    pub buf_alloc: u32,
    /// How many bytes the sender has passed on, modulo 2^32.
    pub fwd_cnt: u32,
}

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Accepts one.
    Response,
    /// Ends one at once, or refuses it.
    Reset,
    /// Says that no more will be sent or received.
    Shutdown,
    /// Carries payload.
    ReadWrite,
    /// Tells about the sender's buffer.
    CreditUpdate,
    /// Asks for a [`Op::CreditUpdate`].
    CreditRequest,
}

/// Bytes of a header.
pub const HEADER_BYTES: usize = 44;
/// The only kind of socket offered.
pub const TYPE_STREAM: u16 = 1;
/// With [`Op::Shutdown`]: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// With [`Op::Shutdown`]: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// The host's context id.
pub const HOST_CID: u64 = 2;

impl Header {
    /// Reads a header from its bytes.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let u64_at = |at: usize| u64::from_le_bytes(array(bytes, at));
        let u32_at = |at: usize| u32::from_le_bytes(array(bytes, at));
        let u16_at = |at: usize| u16::from_le_bytes(array(bytes, at));
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// Writes the header as its bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

impl Op {
    /// The number on the wire.
    pub fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::ReadWrite => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }

    /// The operation with this number, if there is one.
    pub fn from_number(number: u16) -> Option<Self> {
        const ALL: [Op; 7] = [
            Op::Request,
            Op::Response,
            Op::Reset,
            Op::Shutdown,
            Op::ReadWrite,
            Op::CreditUpdate,
            Op::CreditRequest,
        ];
        ALL.into_iter().find(|op| op.number() == number)
    }
}

fn array<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[at..at + N]);
    part
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn operations_have_the_numbers_of_the_specification() {
        let numbers: Vec<_> = (0..9).map(Op::from_number).collect();
        assert_eq!(numbers[0], None);
        assert_eq!(numbers[1], Some(Op::Request));
        assert_eq!(numbers[3], Some(Op::Reset));
        assert_eq!(numbers[5], Some(Op::ReadWrite));
        assert_eq!(numbers[7], Some(Op::CreditRequest));
        assert_eq!(numbers[8], None);
    }

    proptest! {
        #[test]
        fn any_header_survives_the_round_trip(bytes in any::<[u8; 32]>(), rest in any::<[u8; 12]>()) {
            let mut all = [0; HEADER_BYTES];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&rest);
            prop_assert_eq!(Header::parse(&all).encode(), all);
        }
    }
}
