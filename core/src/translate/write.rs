//! Writes JSON, value by value. Commas come by themselves.

use super::doc::Value;

/// A document that is being written.
#[derive(Debug, Default)]
pub struct Writer {
    out: String,
    /// The next value or key needs a comma before it.
    comma: bool,
}

impl Writer {
    pub fn with_capacity(bytes: usize) -> Self {
        Writer { out: String::with_capacity(bytes), comma: false }
    }

    pub fn into_string(self) -> String {
        self.out
    }

    /// Bytes written so far.
    pub fn len(&self) -> usize {
        self.out.len()
    }

    pub fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    fn separate(&mut self) {
        if std::mem::replace(&mut self.comma, true) {
            self.out.push(',');
        }
    }

    pub fn object(&mut self, write: impl FnOnce(&mut Self)) {
        self.nest('{', '}', write);
    }

    pub fn array(&mut self, write: impl FnOnce(&mut Self)) {
        self.nest('[', ']', write);
    }

    fn nest(&mut self, open: char, close: char, write: impl FnOnce(&mut Self)) {
        self.separate();
        self.out.push(open);
        self.comma = false;
        write(self);
        self.out.push(close);
        self.comma = true;
    }

    /// A member's name; its value is to follow.
    pub fn key(&mut self, name: &str) -> &mut Self {
        self.separate();
        escape(name, &mut self.out);
        self.out.push(':');
        self.comma = false;
        self
    }

    pub fn str(&mut self, text: &str) {
        self.separate();
        escape(text, &mut self.out);
    }

    /// A value of another document, byte for byte.
    pub fn value(&mut self, value: Value<'_>) {
        self.raw(value.raw());
    }

    /// JSON as it stands.
    pub fn raw(&mut self, json: &str) {
        self.separate();
        self.out.push_str(json);
    }

    /// One string of several escaped parts.
    pub fn parts<'a>(&mut self, parts: impl IntoIterator<Item = &'a str>) {
        self.separate();
        self.out.push('"');
        self.out.extend(parts);
        self.out.push('"');
    }

    pub fn number(&mut self, number: impl Into<i128>) {
        let number: i128 = number.into();
        self.raw(&number.to_string());
    }

    pub fn bool(&mut self, bool: bool) {
        self.raw(if bool { "true" } else { "false" });
    }

    pub fn null(&mut self) {
        self.raw("null");
    }
}

/// Appends a string with its quotes.
pub fn escape(text: &str, out: &mut String) {
    out.push('"');
    let mut rest = text;
    while let Some(at) = rest.bytes().position(|b| b < 0x20 || b == b'"' || b == b'\\') {
        let (plain, tail) = rest.split_at_checked(at).unwrap_or((rest, ""));
        out.push_str(plain);
        let mut tail = tail.chars();
        match tail.next() {
            Some('\n') => out.push_str("\\n"),
            Some('\r') => out.push_str("\\r"),
            Some('\t') => out.push_str("\\t"),
            Some(c @ ('"' | '\\')) => out.extend(['\\', c]),
            Some(c) => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            None => {}
        }
        rest = tail.as_str();
    }
    out.push_str(rest);
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn commas_come_by_themselves() {
        let mut w = Writer::default();
        w.object(|w| {
            w.key("a").number(1);
            w.key("b").array(|w| {
                w.str("x");
                w.object(|_| {});
                w.array(|w| w.null());
                w.bool(true);
            });
            w.key("c").parts(["p\\n", "q"]);
        });
        assert_eq!(w.into_string(), r#"{"a":1,"b":["x",{},[null],true],"c":"p\nq"}"#);
    }

    proptest! {
        #[test]
        fn any_text_is_read_back(text in any::<String>()) {
            let mut w = Writer::default();
            w.str(&text);
            prop_assert_eq!(serde_json::from_str::<String>(&w.into_string()).unwrap(), text);
        }
    }
}
