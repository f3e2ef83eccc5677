CREATE TABLE `__new_variant_latencies` (
	`experiment_owner` text NOT NULL,
	`experiment` text NOT NULL,
	`variant` text NOT NULL,
	`region` text NOT NULL,
	`measure` text NOT NULL,
	`bucket` integer NOT NULL,
	`count` integer NOT NULL,
	PRIMARY KEY(`experiment_owner`, `experiment`, `variant`, `region`, `measure`, `bucket`)
);
--> statement-breakpoint
INSERT INTO `__new_variant_latencies`("experiment_owner", "experiment", "variant", "region", "measure", "bucket", "count") SELECT coalesce((SELECT `owner` FROM `experiments` WHERE `id` = `variant_latencies`.`experiment`), ''), "experiment", "variant", "region", "measure", "bucket", "count" FROM `variant_latencies`;--> statement-breakpoint
DROP TABLE `variant_latencies`;--> statement-breakpoint
ALTER TABLE `__new_variant_latencies` RENAME TO `variant_latencies`;--> statement-breakpoint
CREATE TABLE `__new_variant_outcomes` (
	`experiment_owner` text NOT NULL,
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
	PRIMARY KEY(`experiment_owner`, `experiment`, `variant`, `region`)
);
--> statement-breakpoint
INSERT INTO `__new_variant_outcomes`("experiment_owner", "experiment", "variant", "region", "requests", "errors", "ttft_count", "ttft_sum", "ttft_sq", "tpot_count", "tpot_sum", "tpot_sq", "prompt_tokens", "completion_tokens", "completion_tokens_sq", "ratings", "ratings_up", "agreement_count", "agreement_sum", "agreement_sq") SELECT coalesce((SELECT `owner` FROM `experiments` WHERE `id` = `variant_outcomes`.`experiment`), ''), "experiment", "variant", "region", "requests", "errors", "ttft_count", "ttft_sum", "ttft_sq", "tpot_count", "tpot_sum", "tpot_sq", "prompt_tokens", "completion_tokens", "completion_tokens_sq", "ratings", "ratings_up", "agreement_count", "agreement_sum", "agreement_sq" FROM `variant_outcomes`;--> statement-breakpoint
DROP TABLE `variant_outcomes`;--> statement-breakpoint
ALTER TABLE `__new_variant_outcomes` RENAME TO `variant_outcomes`;--> statement-breakpoint
CREATE TABLE `__new_experiments` (
	`owner` text NOT NULL,
	`id` text NOT NULL,
	`definition` text NOT NULL,
	`created_at_ms` integer NOT NULL,
	`starts_at_ms` integer,
	`ends_at_ms` integer,
	`stopped_at_ms` integer,
	`revision` integer NOT NULL,
	`actor` text NOT NULL,
	PRIMARY KEY(`owner`, `id`)
);
--> statement-breakpoint
INSERT INTO `__new_experiments`("owner", "id", "definition", "created_at_ms", "starts_at_ms", "ends_at_ms", "stopped_at_ms", "revision", "actor") SELECT "owner", "id", "definition", "created_at_ms", "starts_at_ms", "ends_at_ms", "stopped_at_ms", "revision", "actor" FROM `experiments`;--> statement-breakpoint
DROP TABLE `experiments`;--> statement-breakpoint
ALTER TABLE `__new_experiments` RENAME TO `experiments`;--> statement-breakpoint
ALTER TABLE `events` ADD `experiment_owner` text DEFAULT '' NOT NULL;--> statement-breakpoint
UPDATE `events` SET `experiment_owner` = coalesce((SELECT `owner` FROM `experiments` WHERE `id` = `events`.`experiment`), '') WHERE `experiment` <> 'none';