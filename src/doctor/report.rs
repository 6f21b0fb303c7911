//! What the checks found, and how it is printed.

use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Ok,
    NotChecked,
    Warn,
    Fault,
}

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub status: Status,
    pub found: String,
    /// What a person can do about it.
    pub cure: Option<String>,
}

impl Outcome {
    pub fn ok(found: impl Into<String>) -> Self {
        Outcome { status: Status::Ok, found: found.into(), cure: None }
    }

    pub fn warn(found: impl Into<String>, cure: impl Into<String>) -> Self {
        Outcome { status: Status::Warn, found: found.into(), cure: Some(cure.into()) }
    }

    pub fn fault(found: impl Into<String>, cure: impl Into<String>) -> Self {
        Outcome { status: Status::Fault, found: found.into(), cure: Some(cure.into()) }
    }

    pub fn not_checked(why: impl Into<String>) -> Self {
        Outcome { status: Status::NotChecked, found: why.into(), cure: None }
    }

    pub fn is_fault(&self) -> bool {
        self.status == Status::Fault
    }
}

/// Gathers everything that one check finds wrong.
#[derive(Debug, Default)]
pub struct Findings(Vec<Outcome>);

impl Findings {
    pub fn fault(&mut self, found: impl Into<String>, cure: impl Into<String>) {
        self.0.push(Outcome::fault(found, cure));
    }

    pub fn warn(&mut self, found: impl Into<String>, cure: impl Into<String>) {
        self.0.push(Outcome::warn(found, cure));
    }

    /// All of it as one outcome, as bad as the worst; without findings, `fine`.
    pub fn or_ok(self, fine: impl Into<String>) -> Outcome {
        let Some(status) = self.0.iter().map(|outcome| outcome.status).max() else { return Outcome::ok(fine) };
        let mut cures: Vec<String> = Vec::new();
        for cure in self.0.iter().filter_map(|outcome| outcome.cure.clone()) {
            if !cures.contains(&cure) {
                cures.push(cure);
            }
        }
        let found: Vec<String> = self.0.into_iter().map(|outcome| outcome.found).collect();
        Outcome { status, found: found.join("; "), cure: Some(cures.join(". ")) }
    }
}

/// One line of the report.
#[derive(Debug, Serialize)]
pub struct Check {
    pub check: String,
    pub status: Status,
    pub found: String,
    pub cure: Option<String>,
}

/// All checks in the order in which they were made.
#[derive(Debug, Default)]
pub struct Report {
    checks: Vec<Check>,
    /// Texts that must never be printed, whatever a message of Envoy or of a library repeats.
    secrets: Vec<String>,
}

impl Report {
    /// Keeps a text out of everything that is printed.
    pub fn hide(&mut self, secret: &str) {
        let secret = secret.trim();
        let secret = secret.strip_prefix("Bearer ").unwrap_or(secret);
        // Blotting out a few letters would only make the report unreadable.
        if secret.len() >= 8 {
            self.secrets.push(secret.to_owned());
        }
    }

    pub fn add(&mut self, check: impl Into<String>, outcome: Outcome) {
        let hidden = |text: String| self.secrets.iter().fold(text, |text, secret| text.replace(secret.as_str(), "[secret]"));
        let (found, cure) = (hidden(outcome.found), outcome.cure.map(hidden));
        self.checks.push(Check { check: check.into(), status: outcome.status, found, cure });
    }

    pub fn count(&self, status: Status) -> usize {
        self.checks.iter().filter(|check| check.status == status).count()
    }

    pub fn table(&self) -> String {
        let width = self.checks.iter().map(|check| check.check.len()).max().unwrap_or(0);
        let mut text = String::new();
        for check in &self.checks {
            let status = match check.status {
                Status::Ok => "ok",
                Status::NotChecked => "not checked",
                Status::Warn => "warn",
                Status::Fault => "FAULT",
            };
            // What another program said may have several lines.
            let one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            text.push_str(&format!("{status:11}  {:width$}  {}\n", check.check, one_line(&check.found)));
            if let Some(cure) = &check.cure {
                text.push_str(&format!("{:11}  {:width$}  -> {}\n", "", "", one_line(cure)));
            }
        }
        text
    }

    pub fn json(&self) -> Result<String, String> {
        serde_json::to_string_pretty(&self.checks).map(|text| text + "\n").map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One check may find several things wrong: the worst decides, and nothing is lost.
    #[test]
    fn findings_add_up() {
        assert_eq!(Findings::default().or_ok("fine"), Outcome::ok("fine"));
        let mut findings = Findings::default();
        findings.warn("slow", "hurry");
        findings.fault("wrong", "mend it");
        findings.fault("wrong as well", "mend it");
        assert_eq!(findings.or_ok("fine"), Outcome::fault("slow; wrong; wrong as well", "hurry. mend it"));
    }

    /// A library's message may repeat what it was given.
    #[test]
    fn secrets_are_blotted_out() {
        let mut report = Report::default();
        report.hide("Bearer kwe_0123456789\n");
        report.hide("");
        report.add("x", Outcome::fault("bad header: Bearer kwe_0123456789", "replace kwe_0123456789"));
        let printed = report.table() + &report.json().unwrap();
        assert!(!printed.contains("0123456789") && printed.contains("[secret]"), "{printed}");
        assert_eq!(report.count(Status::Fault), 1);
    }
}
