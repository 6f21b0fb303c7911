//! Who may do what through the admin API: one table of roles and permissions.

use super::{Service, ServiceError, now_ms};
use crate::config;
use crate::store::TokenRow;
use crate::vault::random;
use keyward_core::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use utoipa::ToSchema;
use zeroize::Zeroizing;

/// What a person or tool is, to the admin API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Everything.
    Admin,
    /// Everything but making and revoking admin tokens, and making organisations.
    Operator,
    /// Reads everything, changes nothing.
    Auditor,
    /// The keys of one team, within the team's limits; reads policies and routes, and nothing of what is behind them.
    Developer,
}

/// What an operation of the API needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permission {
    ReadKeys,
    WriteKeys,
    ReadUsage,
    ReadAudit,
    /// Teams, policies, routes.
    ReadConfiguration,
    /// Providers, pools, credentials (never their secrets), the whole document.
    ReadSupply,
    WriteConfiguration,
    ReadTokens,
    WriteTokens,
    ReadOrganisations,
    WriteOrganisations,
    ImportSettlements,
}

impl Role {
    pub fn may(self, permission: Permission) -> bool {
        use Permission::{
            ImportSettlements, ReadAudit, ReadConfiguration, ReadKeys, ReadOrganisations, ReadSupply, ReadTokens, ReadUsage,
            WriteConfiguration, WriteKeys, WriteOrganisations, WriteTokens,
        };
        match permission {
            ReadKeys | ReadUsage | ReadAudit | ReadConfiguration => true,
            WriteKeys => matches!(self, Role::Admin | Role::Operator | Role::Developer),
            ReadSupply | ReadTokens | ReadOrganisations => matches!(self, Role::Admin | Role::Operator | Role::Auditor),
            WriteConfiguration | ImportSettlements => matches!(self, Role::Admin | Role::Operator),
            WriteTokens | WriteOrganisations => self == Role::Admin,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Role::Admin => "admin",
            Role::Operator => "operator",
            Role::Auditor => "auditor",
            Role::Developer => "developer",
        }
    }

    fn by_name(name: &str) -> Option<Self> {
        [Role::Admin, Role::Operator, Role::Auditor, Role::Developer].into_iter().find(|role| role.name() == name)
    }
}

/// Whoever holds a valid admin token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    pub token_id: String,
    pub organisation: String,
    pub role: Role,
    /// Developers belong to one team.
    pub team: Option<String>,
}

impl Principal {
    /// Keyward's own command, on the machine where it runs.
    pub fn local(what: &str) -> Self {
        Principal { token_id: what.to_owned(), organisation: super::ORGANISATION.to_owned(), role: Role::Admin, team: None }
    }

    /// How the audit chain names it.
    pub fn actor(&self) -> String {
        format!("{} {}", self.role.name(), self.token_id)
    }

    pub fn needs(&self, permission: Permission) -> Result<(), ServiceError> {
        if self.role.may(permission) {
            Ok(())
        } else {
            Err(ServiceError::Forbidden(format!("the role {} may not do this", self.role.name())))
        }
    }
}

/// What a new admin token is for.
#[derive(Debug, Clone)]
pub struct TokenSpec {
    pub role: Role,
    pub team: Option<String>,
    pub label: String,
    pub expires_in: Option<String>,
}

impl Service {
    /// Makes an admin token. The token is in the answer and nowhere else.
    pub async fn create_admin_token(&self, who: &Principal, spec: TokenSpec) -> Result<(TokenRow, Zeroizing<String>), ServiceError> {
        who.needs(Permission::WriteTokens)?;
        let (row, token, hash) = self.new_token(&who.organisation, spec)?;
        self.store.put_admin_token(row.clone(), hash, &who.actor()).await?;
        Ok((row, token))
    }

    /// A token that is not stored yet, and what will be stored of it.
    pub(super) fn new_token(&self, organisation: &str, spec: TokenSpec) -> Result<(TokenRow, Zeroizing<String>, [u8; 32]), ServiceError> {
        let invalid = |field: &str, message: String| ServiceError::Invalid(field.to_owned(), message);
        if spec.label.len() > 200 {
            return Err(invalid("label", "must be at most 200 bytes".to_owned()));
        }
        if (spec.role == Role::Developer) != spec.team.is_some() {
            return Err(invalid("team", "a developer belongs to a team, and nobody else does".to_owned()));
        }
        if let Some(team) = &spec.team
            && !self.organisation(organisation)?.document.teams.contains_key(team)
        {
            return Err(invalid("team", format!("there is no team {team:?}")));
        }
        let ttl = spec.expires_in.as_deref().map(config::parse_duration).transpose().map_err(|message| invalid("expires_in", message))?;
        let now = now_ms();
        let token = Zeroizing::new(format!("kwa_{}", hex::encode(&random::<32>()?)));
        let row = TokenRow {
            id: format!("adt_{}", hex::encode(&random::<8>()?)),
            organisation: organisation.to_owned(),
            role: spec.role.name().to_owned(),
            team: spec.team,
            label: spec.label,
            created_ms: now,
            expires_ms: ttl.map(|ttl| now.saturating_add(super::millis(ttl))),
            revoked_ms: None,
        };
        let hash = self.admin_hash(&token);
        Ok((row, token, hash))
    }

    /// Whose token it is. `None`: nobody's, or it is revoked or expired.
    pub async fn principal(&self, token: &str) -> Result<Option<Principal>, ServiceError> {
        let Some(row) = self.store.admin_token(self.admin_hash(token)).await? else { return Ok(None) };
        let over = row.revoked_ms.is_some() || row.expires_ms.is_some_and(|at| at <= now_ms());
        let role = Role::by_name(&row.role).filter(|_| !over);
        Ok(role.map(|role| Principal { token_id: row.id, organisation: row.organisation, role, team: row.team }))
    }

    pub async fn admin_tokens(&self, who: &Principal, after: &str, limit: u32) -> Result<Vec<TokenRow>, ServiceError> {
        who.needs(Permission::ReadTokens)?;
        Ok(self.store.admin_tokens(&who.organisation, after, limit).await?)
    }

    pub async fn revoke_admin_token(&self, who: &Principal, id: &str) -> Result<(), ServiceError> {
        who.needs(Permission::WriteTokens)?;
        let found = self.store.revoke_admin_token(&who.organisation, id, &who.actor(), now_ms()).await?;
        if found { Ok(()) } else { Err(ServiceError::NotFound("admin token")) }
    }

    fn admin_hash(&self, token: &str) -> [u8; 32] {
        self.pepper(&Sha256::digest(token.as_bytes()).into())
    }
}
