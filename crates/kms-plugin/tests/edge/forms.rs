//! The forms of `:authority` that are seen in the field, hundreds of requests long, against the real server.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::double::{World, policy};
use crate::serving::Plugin;
use crate::wire::{
    ACK, DATA, END_STREAM, Encoder, Field, Form, Framing, HEADERS, PREFACE, SETTINGS, write_block,
    write_frame,
};

const RST_STREAM: u8 = 0x3;
const PING: u8 = 0x6;
const GOAWAY: u8 = 0x7;
const WINDOW_UPDATE: u8 = 0x8;
const SETTINGS_HEADER_TABLE_SIZE: [u8; 2] = [0, 1];

/// Path, and what must be in the answer.
const METHODS: [(&str, &[u8]); 2] = [
    ("/v1beta1.KeyManagementService/Version", b"v1beta1"),
    ("/v2.KeyManagementService/Status", b"ok"),
];

#[tokio::test]
async fn case_03_every_form_of_authority_is_answered() {
    let plugin = Plugin::on_a_file(World::new(policy()).started().await);
    let raw = plugin.address.as_bytes();
    let encoded = plugin.address.replace('/', "%2F");
    for authority in
        [None, Some(&b"localhost"[..]), Some(b"@kms.sock"), Some(encoded.as_bytes()), Some(raw)]
    {
        let mut client = Client::connect(&plugin.address).await;
        for number in 0..300 {
            client.ask(authority, number).await;
        }
    }
}

/// A client that writes each request in another way.
struct Client {
    stream: UnixStream,
    encoder: Encoder,
    next_stream: u32,
}

impl Client {
    async fn connect(path: &str) -> Client {
        let mut bytes = PREFACE.to_vec();
        write_frame(SETTINGS, 0, 0, &[], &mut bytes);
        write_frame(WINDOW_UPDATE, 0, 0, &(1_u32 << 24).to_be_bytes(), &mut bytes);
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        Client { stream, encoder: Encoder::new(), next_stream: 1 }
    }

    async fn ask(&mut self, authority: Option<&[u8]>, number: usize) {
        let (path, expected) = METHODS[number % METHODS.len()];
        let stream = self.next_stream;
        self.next_stream += 2;
        let request = self.request(stream, path, authority, number);
        self.stream.write_all(&request).await.unwrap();
        let answer = self.answer(stream).await;
        let found = answer.windows(expected.len()).any(|window| window == expected);
        assert!(found, "{path}, authority {authority:?}, request {number}: {answer:?}");
    }

    fn request(
        &mut self,
        stream: u32,
        path: &str,
        authority: Option<&[u8]>,
        number: usize,
    ) -> Vec<u8> {
        let mut block = Vec::new();
        if number % 50 == 49 {
            // Evicts everything, so that the authority has to come again.
            self.encoder.resize(0, &mut block);
            self.encoder.resize(4096, &mut block);
        }
        let authority = authority.map(|value| Field {
            form: [Form::Indexing, Form::Indexing, Form::Without, Form::Never][number / 7 % 4],
            by_index: number % 11 != 10,
            huffman: (number.is_multiple_of(3), number.is_multiple_of(2)),
            ..Field::usual(":authority", value)
        });
        // A new value each time: it fills the dynamic table until older entries fall out, as with grpc-go.
        let timeout = format!("{}u", 2_000_000 + number);
        let pseudo = [(":method", "POST"), (":scheme", "http"), (":path", path)];
        let regular = [
            ("content-type", "application/grpc"),
            ("user-agent", "grpc-go/1.82.1"),
            ("te", "trailers"),
            ("grpc-timeout", &timeout),
        ];
        let usual = |(name, value): &(&str, &str)| Field::usual(name, value.as_bytes());
        for field in pseudo.iter().map(usual).chain(authority).chain(regular.iter().map(usual)) {
            self.encoder.field(&field, &mut block);
        }
        let framing = Framing {
            padding: (number % 4 == 1).then_some(9),
            priority: number % 5 == 2,
            fragments: if number % 3 == 2 { vec![3, 0, 11] } else { vec![] },
            end_stream: false,
        };
        let mut bytes = Vec::new();
        write_block(stream, &block, &framing, &mut bytes);
        write_frame(DATA, END_STREAM, stream, &[0; 5], &mut bytes);
        bytes
    }

    /// All DATA of the stream up to its end.
    async fn answer(&mut self, wanted: u32) -> Vec<u8> {
        let mut data = Vec::new();
        loop {
            let mut head = [0; 9];
            self.stream.read_exact(&mut head).await.unwrap();
            let [l2, l1, l0, kind, flags, id @ ..] = head;
            let mut payload = vec![0; u32::from_be_bytes([0, l2, l1, l0]) as usize];
            self.stream.read_exact(&mut payload).await.unwrap();
            match kind {
                RST_STREAM | GOAWAY => panic!("refused: {head:?} {payload:?}"),
                SETTINGS if flags & ACK == 0 => self.settings(&payload).await,
                PING if flags & ACK == 0 => self.send(PING, ACK, &payload).await,
                DATA if u32::from_be_bytes(id) == wanted => data.extend(payload),
                _ => {}
            }
            let ends = matches!(kind, DATA | HEADERS) && flags & END_STREAM != 0;
            if ends && u32::from_be_bytes(id) == wanted {
                return data;
            }
        }
    }

    async fn settings(&mut self, payload: &[u8]) {
        // The adapter counts on the default.
        assert!(payload.chunks(6).all(|setting| setting[..2] != SETTINGS_HEADER_TABLE_SIZE));
        self.send(SETTINGS, ACK, &[]).await;
    }

    async fn send(&mut self, kind: u8, flags: u8, payload: &[u8]) {
        let mut bytes = Vec::new();
        write_frame(kind, flags, 0, payload, &mut bytes);
        self.stream.write_all(&bytes).await.unwrap();
    }
}
