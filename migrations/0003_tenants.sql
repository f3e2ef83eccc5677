CREATE TABLE `usage` (
	`tenant_id` text NOT NULL,
	`day` text NOT NULL,
	`model` text NOT NULL,
	`mask` text NOT NULL,
	`requests` integer NOT NULL,
	`errors` integer NOT NULL,
	`prompt_tokens` integer NOT NULL,
	`completion_tokens` integer NOT NULL,
	PRIMARY KEY(`tenant_id`, `day`, `model`, `mask`)
);
--> statement-breakpoint
ALTER TABLE `api_keys` ADD `replaced_by` text;--> statement-breakpoint
ALTER TABLE `tenants` ADD `enabled` integer DEFAULT true NOT NULL;--> statement-breakpoint
ALTER TABLE `tenants` ADD `models` text;--> statement-breakpoint
ALTER TABLE `tenants` ADD `sparsity_max` real;--> statement-breakpoint
ALTER TABLE `tenants` ADD `requests_per_minute` integer;--> statement-breakpoint
ALTER TABLE `tenants` ADD `tokens_per_minute` integer;--> statement-breakpoint
ALTER TABLE `tenants` ADD `requests_per_day` integer;--> statement-breakpoint
ALTER TABLE `tenants` ADD `tokens_per_day` integer;--> statement-breakpoint
ALTER TABLE `tenants` ADD `agreement_min` real;