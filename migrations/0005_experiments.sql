CREATE TABLE `events` (
	`id` text PRIMARY KEY NOT NULL,
	`batch` text NOT NULL,
	`created_at_ms` integer NOT NULL,
	`day` text NOT NULL,
	`key_id` text NOT NULL,
	`tenant` text NOT NULL,
	`model` text NOT NULL,
	`version` text NOT NULL,
	`cluster` integer NOT NULL,
	`mask` text NOT NULL,
	`sparsity` real NOT NULL,
	`fallback` text NOT NULL,
	`experiment` text NOT NULL,
	`variant` text NOT NULL,
	`region` text NOT NULL,
	`requests` integer NOT NULL,
	`errors` integer NOT NULL,
	`failures` integer NOT NULL,
	`ttft_ms` real,
	`tpot_ms` real,
	`prompt_tokens` integer NOT NULL,
	`completion_tokens` integer NOT NULL,
	`rating` integer,
	`agreement` real
);
--> statement-breakpoint
CREATE INDEX `events_batch` ON `events` (`batch`);--> statement-breakpoint
CREATE INDEX `events_created` ON `events` (`created_at_ms`);--> statement-breakpoint
CREATE TABLE `experiments` (
	`id` text PRIMARY KEY NOT NULL,
	`owner` text NOT NULL,
	`definition` text NOT NULL,
	`created_at_ms` integer NOT NULL,
	`starts_at_ms` integer,
	`ends_at_ms` integer,
	`stopped_at_ms` integer,
	`revision` integer NOT NULL,
	`actor` text NOT NULL
);
--> statement-breakpoint
CREATE TABLE `outcomes` (
	`minute` integer NOT NULL,
	`tenant` text NOT NULL,
	`model` text NOT NULL,
	`version` text NOT NULL,
	`cluster` integer NOT NULL,
	`mask` text NOT NULL,
	`sparsity` real NOT NULL,
	`fallback` text NOT NULL,
	`experiment` text NOT NULL,
	`variant` text NOT NULL,
	`region` text NOT NULL,
	`requests` integer NOT NULL,
	`errors` integer NOT NULL,
	`ttft_count` integer NOT NULL,
	`ttft_sum` real NOT NULL,
	`ttft_sq` real NOT NULL,
	`tpot_count` integer NOT NULL,
	`tpot_sum` real NOT NULL,
	`tpot_sq` real NOT NULL,
	`prompt_tokens` integer NOT NULL,
	`completion_tokens` integer NOT NULL,
	`completion_tokens_sq` real NOT NULL,
	`ratings` integer NOT NULL,
	`ratings_up` integer NOT NULL,
	`agreement_count` integer NOT NULL,
	`agreement_sum` real NOT NULL,
	`agreement_sq` real NOT NULL,
	PRIMARY KEY(`minute`, `tenant`, `model`, `version`, `cluster`, `mask`, `sparsity`, `fallback`, `experiment`, `variant`, `region`)
);
--> statement-breakpoint
CREATE INDEX `outcomes_version` ON `outcomes` (`version`,`minute`);--> statement-breakpoint
CREATE INDEX `outcomes_tenant` ON `outcomes` (`tenant`,`minute`);--> statement-breakpoint
CREATE TABLE `variant_outcomes` (
	`experiment` text NOT NULL,
	`variant` text NOT NULL,
	`region` text NOT NULL,
	`requests` integer NOT NULL,
	`errors` integer NOT NULL,
	`ttft_count` integer NOT NULL,
	`ttft_sum` real NOT NULL,
	`ttft_sq` real NOT NULL,
	`tpot_count` integer NOT NULL,
	`tpot_sum` real NOT NULL,
	`tpot_sq` real NOT NULL,
	`prompt_tokens` integer NOT NULL,
	`completion_tokens` integer NOT NULL,
	`completion_tokens_sq` real NOT NULL,
	`ratings` integer NOT NULL,
	`ratings_up` integer NOT NULL,
	`agreement_count` integer NOT NULL,
	`agreement_sum` real NOT NULL,
	`agreement_sq` real NOT NULL,
	PRIMARY KEY(`experiment`, `variant`, `region`)
);
